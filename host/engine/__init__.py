"""What every verb needs of the host: model calls, attention, gradients, samplers, previews."""
