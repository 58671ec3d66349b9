"""The server in several processes: replicas on Ray Serve behind one front, which is the only one that knows HTTP."""
