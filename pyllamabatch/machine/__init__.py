"""A machine of which only a profile is there: an engine's device that computes nothing and takes
the time that the profile says."""
