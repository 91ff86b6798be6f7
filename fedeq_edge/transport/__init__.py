"""How payloads travel: one `Transport` seam; an in-memory broker for tests, MQTT, and a broker ladder."""
