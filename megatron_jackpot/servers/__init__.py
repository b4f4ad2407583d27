"""SGLang servers: client, replies, administration, and the processes themselves."""
