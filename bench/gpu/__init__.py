"""Everything that needs a GPU: a resumable queue of steps, each a process of its own."""
