"""Reference drafts: small enough to read, and what `train` fits. They need torch and safetensors."""
