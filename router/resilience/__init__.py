"""What failures lead to: breakers, retries within a budget, replies that go on.

What is decided here: whether a failing engine or provider is tried, whether another attempt is
paid for, where a reply resumes. Asked by the fleet, by scheduling and by the shells.
"""
