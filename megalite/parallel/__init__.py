"""One tensor on several ranks: groups, collectives, placement, split layers, the loss."""
