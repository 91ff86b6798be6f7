"""From a box of boards to a fleet: identity, bundles, flashing, updates."""
