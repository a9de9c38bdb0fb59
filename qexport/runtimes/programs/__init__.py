"""What runs in the environments of other runtimes: started as scripts, by any Python from 3.9 on, without qexport."""
