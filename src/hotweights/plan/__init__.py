"""Plans: which bytes of a checkpoint become which bytes of a model. Pure data; nothing here runs one."""
