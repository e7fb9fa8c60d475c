"""A dataset on the Hugging Face Hub and back.

    remote   one dataset repository: its tree, commits that survive lost answers, downloads
    push     a dataset -> a repository
    pull     a repository -> a dataset

What is already there is never moved again: files are compared by content hash, so both can be stopped at any time and
started again. The trade-off: one committer at a time per repository; a second one is told apart, and waits its turn.
"""
