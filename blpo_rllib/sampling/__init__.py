"""How episodes are sampled: EnvRunner, acting, and vector environments."""
