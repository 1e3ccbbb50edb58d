"""Several models on one machine: how many engines each gets, and what an edit of them changes.

Called by the launcher and the application with the whole configuration, of one model as well.
"""
