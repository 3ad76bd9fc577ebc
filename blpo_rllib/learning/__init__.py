"""The RLlib learner: connectors, players, modules and the learner that puts them together."""
