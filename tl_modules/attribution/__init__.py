"""Attribution: how much each source adds to a target; every method gives the same long table."""
