// The Python module visattn_kernels._C: importing it registers the operators; isa() names the instruction set in use,
// cuda() says whether the CUDA kernels are there.
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

// (built, why not or for what): VISATTN_NO_CUDA is what setup.py found, empty if nothing stood in the way, then
// VISATTN_GENCODE is what nvcc was told.
PyObject* cuda(PyObject*, PyObject*) {
  const char* const reason = VISATTN_NO_CUDA;
  PyObject* const built = PyBool_FromLong(*reason == 0);
  return Py_BuildValue("(Ns)", built, *reason ? reason : VISATTN_GENCODE);
}

PyMethodDef methods[] = {{"isa", isa, METH_NOARGS, "The instruction set that the CPU engine uses."},
                         {"cuda", cuda, METH_NOARGS, "Whether the CUDA kernels were built, and why not, or for what."},
                         {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
