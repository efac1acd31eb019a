"""All that travels with a checkpoint to the Hub: flat, sibling imports only, no registration here."""
