"""Where are the files of one launch, and who removes what is left of it?

Called by the launcher; the supervisor is a process of its own, outside of Ray.
"""
