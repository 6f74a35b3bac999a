// The Python module visattn_kernels._C: importing it registers the operators of the CPU engine; isa() names the
// instruction set in use, no_cuda() says why the CUDA part was not built beside it.
#include <Python.h>

#include <exception>

#include "../cpu/engine.h"

namespace {

PyObject* isa(PyObject*, PyObject*) {
  try {
    return PyUnicode_FromString(visattn::cpu::selected_isa());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

// VISATTN_NO_CUDA is what setup.py found against building the CUDA part, empty if nothing stood in its way.
PyObject* no_cuda(PyObject*, PyObject*) { return PyUnicode_FromString(VISATTN_NO_CUDA); }

PyMethodDef methods[] = {
    {"isa", isa, METH_NOARGS, "The instruction set that the CPU engine uses."},
    {"no_cuda", no_cuda, METH_NOARGS, "Why the CUDA part was not built beside it; empty if it was."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
