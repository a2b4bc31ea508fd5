"""The head behind the signatures of other libraries, none of which is imported."""
