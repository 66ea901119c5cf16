"""From a model folder to modules that run over our pools."""
