"""What a user may write: arguments on the command line, values of a configuration, and one sentence for what is wrong.

``arguments`` takes names and paths as they are typed, ``checking`` holds a composed configuration against the
signatures of what it makes (:mod:`panoptic_ibs.expectations`) and the keys of the commands (``schema``),
``translation`` turns what libraries and the system raise into a sentence.
"""
