"""The experiment: LK losses against KL, and compact shards against exact ones, on a real target, with error bars."""
