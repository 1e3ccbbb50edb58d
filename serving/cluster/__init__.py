"""Ray: the session, the application, discovery of replicas, processes.

What is decided here: which deployments there are and where they run. Called by the command line
and by `serve run`; calls the gateway with the members that Ray names.
"""
