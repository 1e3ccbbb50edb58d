"""Ray: the session, the application, the discovery of replicas, the processes.

What is decided here: which deployments there are and where they run. Called by the command line
and by `serve run`; tells the gateway which replicas Ray has.
"""
