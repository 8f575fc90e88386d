"""The engine: it sees token ids, rows and votes; it knows neither routers nor methods."""
