"""Which model answers a prompt whose client leaves that to us? `model: "auto"`, docs/auto.md.

What is decided here: by readable rules which models may, and by what is predicted of their engines
now which of these does. Asked by the gateway's intake (`serving.gateway.intake.routes`) before a
request is routed; from then on it is as if the client had named the model.
"""
