"""What a name on the command line stands for: a run, an adapter, or a merged model."""
