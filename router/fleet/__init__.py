"""What is known of the engines: reported, booked since, cached, and how healthy.

What is decided here: which engines may be given what kind of work. Asked by `router.scheduling`
for every placement, told by the router of every snapshot, booking and failure.
"""
