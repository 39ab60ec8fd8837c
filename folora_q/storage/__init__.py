"""Files on disk: atomic writes, the cache, reading untrusted files, and redaction of secrets."""
