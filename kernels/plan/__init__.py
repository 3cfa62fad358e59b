"""Plans: a region of a network as a list of steps over one slab of memory."""
