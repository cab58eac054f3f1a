"""Small models whose loading code has the oddities of real ones."""
