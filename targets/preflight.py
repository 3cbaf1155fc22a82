def check_program(program, target):
    pass
