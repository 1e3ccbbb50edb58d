"""What our own code costs: per token, per request, per decision, per cached response."""
