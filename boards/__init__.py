"""Score boards and benches. They stand above the nodes; nothing imports them."""
