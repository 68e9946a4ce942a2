"""The `backbones` component: towers joined into the stock LLaVA folder that every later stage takes."""
