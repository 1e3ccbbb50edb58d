"""What is known of the engines: reported, booked since, cached, and how healthy.

What is decided here: which engines may be given what kind of work. Read by `router.scheduling`
for every placement; the router passes in every snapshot, booking and failure.
"""
