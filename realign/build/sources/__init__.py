"""What a dataset is built from: images with instructions, answers or whole text pairs, in the
layouts that people have them in.
"""

from realign.build.sources.read import Source, read_source

__all__ = ["Source", "read_source"]
