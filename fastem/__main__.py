from fastem.cli import main

main()
