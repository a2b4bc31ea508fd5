"""Our head behind other libraries' signatures; imports none of them."""
