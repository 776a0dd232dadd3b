/* Only for builds with dynamic backends (PLB_PORTABLE): functions of ggml-cpu.h, found at run time. */
#ifndef PLB_CPU_SYMBOL_H
#define PLB_CPU_SYMBOL_H

#ifdef __cplusplus
extern "C" {
#endif

/* The function `name` of the CPU backend that is loaded; loads the backends that lie beside this
 * module (folder lib/) when none is. Ends the process with a message when there is no such function:
 * the caller has no way to go on. */
void * plb_cpu_symbol(const char * name);

#ifdef __cplusplus
}
#endif

#endif /* PLB_CPU_SYMBOL_H */
