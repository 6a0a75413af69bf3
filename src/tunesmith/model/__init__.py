"""Loading models and deciding what trains."""
