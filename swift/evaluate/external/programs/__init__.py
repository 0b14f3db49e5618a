"""What runs in the environment of a package, by its path: see ``program``. Nothing here imports anything of swift."""
