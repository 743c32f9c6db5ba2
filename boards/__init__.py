"""Score boards and benches. They may import every other room; nothing imports them."""
