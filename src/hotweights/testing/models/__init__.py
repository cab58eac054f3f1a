"""Small models that load as real ones do."""
