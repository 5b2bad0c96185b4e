"""S3, Google Cloud Storage and Azure by obstore."""
