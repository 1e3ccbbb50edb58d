"""The gateways of one application, as seen by one of them: what they say and do together.

Decided here: which policy and which drained engines are in force on all of them, and how their
states add up. The endpoints of admins, the live page and `serving.cluster` call it.
"""
