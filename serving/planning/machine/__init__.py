"""What does the operating system allow us, and how do we run one of its processes?

Limits of control groups, for `serving.planning.hardware`; processes whose output is read, for what
fetches models.
"""
