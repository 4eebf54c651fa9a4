from tuft.cli import main

main()
