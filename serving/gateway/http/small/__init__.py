"""What the small endpoints read and say: bodies, cards of models, health.

Nothing of a token's way is here. Called by the gateway's endpoints.
"""
