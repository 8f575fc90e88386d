"""Routers: who answers, in which proportion. Every router returns one value, `Routing`."""
