"""The development machine's tools: a headless host, its client, the gallery, the templates."""
