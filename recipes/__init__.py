"""The programs: one file each, named by the config that runs it."""
