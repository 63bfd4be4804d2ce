"""The pretraining config, and the factory and loaders that build models, views and optimisers from it."""
